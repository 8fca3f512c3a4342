"""Running networks: on images of any size, by several back ends; and what they cost."""
