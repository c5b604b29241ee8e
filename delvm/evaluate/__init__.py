"""A model and held-out sentences -> measurements, pictures and the page that shows them."""
