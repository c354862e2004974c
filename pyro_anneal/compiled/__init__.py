"""How a chunk of annealing steps becomes one program."""
