"""The search app: a web page to search an index, compare search methods and add documents. Needs the extra [demo]."""
