"""What tools do with a trained model: evaluate, infer, convert, trace; and the finder of learning rates."""
