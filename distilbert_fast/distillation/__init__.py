"""Student from teacher, losses, and a Trainer that distils and survives being killed."""
