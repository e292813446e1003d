"""The command `imagegram`: a client for people, made for lines that are slow and break.

It is a client like any other: it imports nothing of the servers, and the servers import nothing of it.
"""
