"""Images -> (image, annotation) pairs and their views."""
