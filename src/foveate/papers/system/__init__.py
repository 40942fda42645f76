"""What papers claim of whole systems, counted: costs, pipelines, bytes on ranks."""
