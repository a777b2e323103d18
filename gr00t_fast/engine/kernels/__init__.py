"""Hand-written Triton kernels for the parts of the network that spend their time in launches and memory traffic, not in arithmetic.

Modules in here import triton when they are imported, so only the engine that asked for it imports them. Each kernel has a function of the same
mathematics through torch next to it, its *twin*: the specification, the other side of every test and of every measurement.
"""
