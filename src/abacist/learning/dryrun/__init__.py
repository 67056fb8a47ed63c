"""What a dry run looks at, one question a file; ``learning.dryrun.plan`` puts them together."""
