"""What pytorch-ood imports from ``torchvision.models``."""
