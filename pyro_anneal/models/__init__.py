"""How a Pyro model is one vector: sites, coordinates, densities, simulation."""
