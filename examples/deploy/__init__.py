"""A network in every format of ``cbpq export``, measured in the tools that read them."""
