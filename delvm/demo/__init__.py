"""A page in the browser: examples and a query in, annotations out, row by row."""
