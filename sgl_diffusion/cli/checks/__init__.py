"""What `sglang doctor` looks at: one function per kind of thing, each gives its checks."""
