"""The verbs inspect, verify and deploy."""
