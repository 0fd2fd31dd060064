"""Where subjects come from: the bundled reference, a folder, the Hub, or a named shape; and how they are saved and opened again."""
