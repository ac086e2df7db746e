"""Bridges to other libraries; each file imports its library, and nothing else in quantkit does."""
