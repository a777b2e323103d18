"""A simulated SO-100 on a table: physics by MuJoCo, pictures by numpy, no hardware and no OpenGL. To look at it: `gr00t-fast sim`."""
