"""Functions of torch written out in operations that have derivatives of every order."""
