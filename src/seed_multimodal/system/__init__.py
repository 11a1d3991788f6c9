"""What a system is made of: its `system.json`, where its parts are, and what it was trained on."""
