// What the kernels that choose experts share.

constexpr int LOWEST_KEY = -2147483647 - 1;

// Floats as integers in the same order. NaN is as low as -infinity, and that above LOWEST_KEY.
__device__ __forceinline__ int order(float x) {
    const int bits = x == x ? (int)__float_as_uint(x) : (int)0xff800000;
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}
