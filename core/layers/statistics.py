"""Mean and deviation of images, by which networks expect their inputs normalised."""

#: Of ImageNet's RGB values in [0, 1], as torchvision, timm and most published weights use them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
