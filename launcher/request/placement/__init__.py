"""Placement: from devices to nodes x processes x devices."""
