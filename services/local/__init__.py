"""Runs the whole suite on one machine: stores from wheels, the four services, and the `tailrace` command. No service imports it."""
