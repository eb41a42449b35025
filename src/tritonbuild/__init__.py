"""Make for NVIDIA Triton model repositories. The data flow is in docs/architecture.md."""
