"""The code of the processes that grade. They start the files of this folder as scripts, without the rest of kibitz."""
