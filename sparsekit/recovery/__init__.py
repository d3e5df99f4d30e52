"""The verb recover."""
