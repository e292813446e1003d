CREATE INDEX feed ON posts (comment_count DESC, id DESC) WHERE status = 'ready';
CREATE INDEX latest ON comments (post_id, id DESC);
VACUUM ANALYZE;
