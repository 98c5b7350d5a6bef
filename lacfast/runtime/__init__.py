"""How work runs on a device: captured graphs, precision, memory, profiling."""
