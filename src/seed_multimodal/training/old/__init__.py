"""The loop of before; nothing new may use it."""
