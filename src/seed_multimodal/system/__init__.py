"""Systems: `system.json`, parts, and the `MultimodalSystem` class."""
