from lmjax.data.task import Task
TASKS = {}
