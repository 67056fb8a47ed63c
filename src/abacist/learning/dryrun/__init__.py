"""What a dry run looks at, one question a file; ``learning.plan`` puts them together."""
