"""Ops of layers with recurrent state: gated delta rules and the short convolutions ahead of them."""
