"""Graph passes: find the linears, cut the graph into blocks, choose what to observe, replace,
decompose.
"""
