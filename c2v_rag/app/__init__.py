"""The search app: a page to search what was indexed, and to see why it was found. Needs the extra [demo]."""
