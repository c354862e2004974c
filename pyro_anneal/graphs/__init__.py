"""How the densities of one chain become a graph of K chains."""
