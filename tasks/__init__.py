"""The tasks: `import tasks` registers them all with seqio. Nothing is read before it is used."""

from tasks import c4, python_docs, text_files

c4.register()
python_docs.register()
text_files.register_configured()
