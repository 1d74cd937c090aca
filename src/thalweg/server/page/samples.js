"use strict";

const SPAN = 30; // scrapes that a quantile or share is of
const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

// Prometheus's text as {name: [{labels, value}]}.
function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const sample = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (sample === null) continue;
    const labels = Object.fromEntries([...(sample[2] ?? "").matchAll(LABEL)].map((label) => [label[1], label[2]]));
    const value = sample[3] === "+Inf" ? Infinity : Number(sample[3]);
    if (!found.has(sample[1])) found.set(sample[1], []);
    found.get(sample[1]).push({ labels, value });
  }
  return found;
}

// The figures below are of `scrapes`, [{at, values}] in order, `at` in seconds. They are null where there is none.
function total(scrape, name) {
  const samples = scrape?.values.get(name);
  return samples === undefined ? null : samples.reduce((sum, sample) => sum + sample.value, 0);
}

function gauge(name) {
  return (scrapes) => total(scrapes.at(-1), name);
}

// By how much a counter grew; a server that began anew counts from 0.
function grown(before, after, name) {
  const [from, to] = [total(before, name), total(after, name)];
  return from === null || to === null ? null : to >= from ? to - from : to;
}

function rate(name) {
  return (scrapes) => {
    const [before, after] = scrapes.slice(-2);
    if (after === undefined) return null;
    return (grown(before, after, name) ?? 0) / (after.at - before.at);
  };
}

function ratio(part, whole) {
  return (scrapes) => {
    const from = scrapes.at(-1 - SPAN) ?? scrapes[0], to = scrapes.at(-1);
    const of = grown(from, to, whole);
    return of ? grown(from, to, part) / of : null;
  };
}

// A quantile of what a histogram counted in the last scrapes; within a bucket it is spread evenly, as Prometheus has it.
function quantile(name, q) {
  return (scrapes) => {
    const from = scrapes.at(-1 - SPAN) ?? scrapes[0], to = scrapes.at(-1);
    const before = new Map((from.values.get(`${name}_bucket`) ?? []).map((b) => [b.labels.le, b.value]));
    const buckets = (to.values.get(`${name}_bucket`) ?? [])
      .map(({ labels, value }) => [labels.le === "+Inf" ? Infinity : Number(labels.le), value - (before.get(labels.le) ?? 0)])
      .sort((a, b) => a[0] - b[0]);
    const count = buckets.at(-1)?.[1];
    if (!(count > 0)) return null;
    let below = 0, bound = 0;
    for (const [end, sum] of buckets) {
      if (sum >= q * count) return end === Infinity ? bound : bound + (end - bound) * (q * count - below) / (sum - below || 1);
      [below, bound] = [sum, end];
    }
    return bound;
  };
}

// The samples of a counter by one of its labels, in all.
function by(name, label) {
  return (scrapes) => (scrapes.at(-1).values.get(name) ?? []).map((sample) => [sample.labels[label], sample.value]);
}
