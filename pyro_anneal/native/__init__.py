"""Native code: the graph of one chain as C++ for many, compiled in a fraction of a second."""
