"""Image work: leases what is due, makes the served JPEG, erases what nobody may see again.

The only room that imports PIL and RQ's worker. Never imports the API.
"""
