"""Teacher and student: objectives over tokens, and the module that minimises them."""
