"""What model families share, as plain data: dimensions of a part, how checkpoint tensors become its weights, and what a
step of it costs. No torch: the modules are in `thalweg.layers`, and `thalweg.models.decoder` puts one to the other."""
