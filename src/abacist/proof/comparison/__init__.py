"""Is it better? The same problems before and after, paired, split and tested."""
