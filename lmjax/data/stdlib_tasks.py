def stdlib_records(name, split, fraction): raise NotImplementedError
