"""The backup: ships the append-only file to object storage, restores it, removes old backups."""
