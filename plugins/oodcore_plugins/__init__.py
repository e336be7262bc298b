"""The built-in plugins: one module a method, source, extractor or family of networks."""
