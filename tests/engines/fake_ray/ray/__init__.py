"""Stands where Ray stands, for tests of the launcher: ``ray start`` and the parts of the REST API that it uses."""
