from a3q.cli import main

main()
