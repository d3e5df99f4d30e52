"""What sparsekit itself costs."""
