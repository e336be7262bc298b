"""A stand-in for torchvision, of which pytorch-ood's detectors want the names alone.

Only the process that measures pytorch-ood has it on its path.
"""
