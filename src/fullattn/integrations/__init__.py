"""Integrations with other libraries. Import the module for the library that you use."""
