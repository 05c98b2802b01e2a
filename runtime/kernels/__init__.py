"""Triton kernels for GPUs, each in a module that needs Triton as soon as it is imported.

Triton compiles a function from the globals of its module, so there is no later place to ask for it.
A kernel's module has a function of its name, which launches it on tensors; with TRITON_INTERPRET=1
it does so on CPUs.
"""
