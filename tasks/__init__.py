"""The tasks: `import tasks` registers them all with seqio. Nothing is read before it is used."""

from tasks import (
    c4,
    coreference,
    glue,
    mixing,
    python_docs,
    question_answering,
    super_glue,
    text_files,
    text_to_text,
)

c4.register()
coreference.register()
glue.register()
python_docs.register()
question_answering.register()
super_glue.register()
text_files.register_configured()
text_to_text.register()
mixing.register()  # of what is registered above
